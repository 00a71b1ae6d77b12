"""What Mamba and Mamba2 share: a layer whose states between calls lie in upstream's `inference_params`."""

import torch
import torch.nn.functional as F


class CachedStates:
    """For a module with `layer_idx`, `step`, `allocate_inference_cache`, a NAME for errors, and

    _from_states(hidden_states, mask, states): (out, states after it) of a whole sequence, or of its next tokens. With
    `cu_seqlens` besides, where a layer passes that on: of whole sequences end to end.
    """

    act = staticmethod(F.silu)  # of upstream's layers, for subclasses with a forward of their own

    def _forward_cached(self, hidden_states, inference_params, mask, cu_seqlens=None):
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        rows = cu_seqlens.shape[0] - 1 if packed else hidden_states.shape[0]
        conv_state, ssm_state = self._get_states_from_cache(inference_params, rows)
        if inference_params.seqlen_offset == 0:
            before = None
        elif packed:
            raise ValueError(f"{self.NAME}: cu_seqlens holds whole sequences, but seqlen_offset is past their start")
        elif hidden_states.shape[1] == 1:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        elif mask is not None:
            raise ValueError(f"{self.NAME}: mask pads the beginning of a sequence, but seqlen_offset is past it")
        else:
            before = (conv_state, ssm_state)
        out, after = self._from_states(hidden_states, mask, before, **packed)
        with torch.no_grad():
            conv_state.copy_(after[0])
            ssm_state.copy_(after[1])
        return out

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False):
        """This layer's rows of the cache, which is made at the first call. Upstream's name: subclasses call it."""
        if self.layer_idx is None:
            raise ValueError(f"{self.NAME}: inference_params need a layer_idx, which this layer was built without")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, None)
        offset = getattr(inference_params, "batch_size_offset", 0)
        states = tuple(state[offset : offset + batch_size] for state in cache[self.layer_idx])
        if initialize_states:
            for state in states:
                state.zero_()
        return states


def pair(name, initial_states):
    """(conv_state, ssm_state), each None where it was not given."""
    if initial_states is None:
        return None, None
    if not isinstance(initial_states, (tuple, list)) or len(initial_states) != 2:
        kind = type(initial_states).__name__
        raise TypeError(f"{name}: initial_states must be a pair (conv_state, ssm_state), got {kind}")
    return initial_states
