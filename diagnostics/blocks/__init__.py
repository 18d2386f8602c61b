"""Exact Hessian blocks between nodes, by one recursion, and what is read off them."""
