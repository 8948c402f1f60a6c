"""Objectives: numbers to minimise that say what they mean."""
