"""The door: reads what the user wrote, and refuses what is wrong."""
