"""Trains a language model under a rule of `priority_dsl`: data, models, the loop, evaluation and the command line."""
