"""How often each verdict fires, on networks of many kinds."""
