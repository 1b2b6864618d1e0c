"""Trains a model under a rule of `priority_dsl`: data, models, the loop, evaluation, the command line."""
