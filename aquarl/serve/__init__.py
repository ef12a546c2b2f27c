"""What happens to a finished policy: chat with it, export it, publish it."""
