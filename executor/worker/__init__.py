"""The program of a checkpoint process: compare, plan, save."""
