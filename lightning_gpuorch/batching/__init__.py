"""How many samples go into one step: halving, memory model, token budgets."""
