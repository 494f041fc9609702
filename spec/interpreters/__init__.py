"""What a formula means before there is a model: shapes, costs, the kind of method that it makes."""
