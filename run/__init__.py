"""What any training run needs: knobs, plan, machine, folder, words. Nothing of the method."""
