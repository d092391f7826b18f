"""Lightning's side: the strategies for Fabric and Trainer, how they are launched, and what they use of Lightning's inside."""
