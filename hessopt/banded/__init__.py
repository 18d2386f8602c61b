"""Newton steps with exact factors and the band's maximum-determinant completion."""
