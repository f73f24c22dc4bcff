"""Output for people who watch a command."""
