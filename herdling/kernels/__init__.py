"""The operations the model is made of, each with a plain reference beside the fast form."""
