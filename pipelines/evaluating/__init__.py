"""Inside evaluation: encoders and tasks as mteb wants them, and tables of what came out."""
