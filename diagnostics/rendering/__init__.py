"""A document as text, figure or page."""
