"""What is known about model families: where their blocks are and which linears share an input."""
