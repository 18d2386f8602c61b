"""Networks and problems that several examples use."""
