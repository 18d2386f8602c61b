"""One call or command that diagnoses a network: plan, sections, the Report and Comparison objects."""
