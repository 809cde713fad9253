"""Problems, a teacher and a tokenizer that the project makes itself, for the tiny preset and the tests."""
