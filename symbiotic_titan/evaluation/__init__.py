"""Scores of what a model makes: pictures, answers and choices of the demo world, each with its chance level and upper bound."""
