"""How functions of networks go wrong: each takes the right function and gives the wrong one; `causes.py` has the table."""
