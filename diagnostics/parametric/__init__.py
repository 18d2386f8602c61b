"""The exact Hessian of the parameters, by the same recursion."""
