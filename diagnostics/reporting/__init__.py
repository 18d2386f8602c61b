"""The parts of a report: what is computed for it, how it is checked, printed and kept."""
