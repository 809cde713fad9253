"""Reading a mathematical answer: notation, numbers, units, structures."""
