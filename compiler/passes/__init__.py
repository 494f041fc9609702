"""Graph → graph, one transformation a file. A pass carries out what the plan says and decides nothing."""
