"""`priority sweep`: several rules, parameters and seeds from one base config, compared in a table."""
