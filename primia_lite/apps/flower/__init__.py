"""A federation over Flower: folders, processes, and rounds of secure aggregation through its Grid."""
