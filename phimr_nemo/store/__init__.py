"""What lies on the disk: record shards, atomic writes, content ids, run directories, and the check of all of them."""
