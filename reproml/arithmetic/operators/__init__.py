"""The exact definition of each ATen operator, one file per family of operators.

operator_table.py maps the name of an operator to its definition here. Most definitions pass a formula of
real numbers to `elementwise` or `rowwise` (compiler/evaluate.py), which round its value to float32 once.
"""
