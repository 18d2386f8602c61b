"""What gradient flow conserves, and by how much SGD does not."""
