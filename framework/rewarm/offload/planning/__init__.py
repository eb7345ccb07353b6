"""Where state should rest and what a step would then take: costs, placements and a simulation. No torch, no device."""
