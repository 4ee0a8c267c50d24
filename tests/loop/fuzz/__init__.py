"""Training loops drawn at random: what users do, in any order."""
