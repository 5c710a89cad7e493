"""The commands. Each parses and prints; one library call does the work."""
