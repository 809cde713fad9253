"""Data: problems, teachers, chat format, curation, packing, batches."""
