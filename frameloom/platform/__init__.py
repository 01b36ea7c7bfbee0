"""What the machine is: devices, their dtypes and their memory. No word of any model."""
