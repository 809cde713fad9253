"""The command `phimr` and its conversations: `chat` and `sample`."""
