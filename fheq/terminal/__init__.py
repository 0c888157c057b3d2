"""Behind the command line: its commands, their data files, and the demo."""
