"""Labels made from other labels: FER phrases from action units and an emotion."""
