"""What the job `rounds` is made of: prompts, samplers, scorers, makers of pairs, and the folder of a round."""
