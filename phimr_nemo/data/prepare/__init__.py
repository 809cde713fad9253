"""The stage `prepare`: one set of problems from many sources, without duplicates and benchmark questions."""
