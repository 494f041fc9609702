"""From a graph to the sites that modules attach to."""
