"""Inside the analysis of attention: weights of the last token, kinds of tokens, the figure."""
