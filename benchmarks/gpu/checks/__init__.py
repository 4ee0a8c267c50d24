"""What must be right on a device: lists of checks, a list a process."""
