"""What runs have said, for people: questions and responses, in a terminal and in a browser; runs compared."""
