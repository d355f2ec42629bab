"""Balanced sparse training: batches and budgets that let all ranks end together."""
