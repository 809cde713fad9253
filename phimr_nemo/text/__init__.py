"""What marks a text of a reasoning model: tags around its thinking, special tokens."""
