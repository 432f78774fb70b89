"""What lies on the disk: boxes of tensors in parts, a table that says where, a manifest that makes it valid."""
