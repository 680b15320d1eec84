//! What a lane received, on its way to the VM.

use rustler::{Encoder, Env, LocalPid, OwnedBinary, OwnedEnv, Term};

use super::frame::Sink;
use super::messages;

/// What a packet costs beside its bytes: a binary's header and its place in a list.
const PACKET_COST: usize = 64;

enum Packet {
    Own(OwnedBinary),
    /// A range of the batch's small bytes.
    Small(usize, usize),
}

/// Whole packets that wait to be delivered in one message.
pub(crate) struct Batch {
    env: OwnedEnv,
    packets: Vec<Packet>,
    small: Vec<u8>,
    cost: usize,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self {
            env: OwnedEnv::new(),
            packets: Vec::new(),
            small: Vec::new(),
            cost: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    pub(crate) fn cost(&self) -> usize {
        self.cost
    }

    pub(crate) fn count(&self) -> usize {
        self.packets.len()
    }

    /// Sends everything in one message. False when the process is gone.
    pub(crate) fn deliver(&mut self, pid: &LocalPid) -> bool {
        let packets = std::mem::take(&mut self.packets);
        let small = std::mem::take(&mut self.small);
        let cost = std::mem::take(&mut self.cost);
        let sent = messages::data(&mut self.env, pid, cost, |env| terms(env, packets, &small));
        self.small = small;
        // A burst of small packets must not pin its buffer for ever, nor each make it anew.
        let used = self.small.len();
        self.small.clear();
        if used < self.small.capacity() / 16 {
            self.small.shrink_to(self.small.capacity() / 2);
        }
        sent
    }
}

fn terms<'a>(env: Env<'a>, packets: Vec<Packet>, small: &[u8]) -> Vec<Term<'a>> {
    let mut owned = OwnedBinary::new(small.len());
    owned.as_mut_slice().copy_from_slice(small);
    let whole = owned.release(env);
    packets
        .into_iter()
        .map(|packet| match packet {
            Packet::Own(binary) => binary.release(env).to_term(env),
            Packet::Small(0, len) if len == whole.len() => whole.to_term(env),
            Packet::Small(start, len) => match whole.make_subbinary(start, len) {
                Ok(part) => part.to_term(env),
                // The ranges come from this very buffer.
                Err(_) => "".encode(env),
            },
        })
        .collect()
}

/// Atoms in a distribution header are illegal on our links, where the atom cache is rejected, and
/// ERTS (25 at least) looks them up in the cache it has not made, and crashes. Cut behind their
/// number such a header is what ERTS knows as corrupted: it logs it and ends the link.
fn end_of_bad_header(packet: &[u8]) -> Option<usize> {
    let atoms_at = match packet {
        [131, b'D', ..] => 2,
        [131, b'E', ..] => 18,
        _ => return None,
    };
    packet
        .get(atoms_at)
        .is_some_and(|&atoms| atoms != 0)
        .then_some(atoms_at + 1)
}

impl Sink for Batch {
    type Large = OwnedBinary;

    fn alloc(&mut self, len: usize) -> OwnedBinary {
        OwnedBinary::new(len)
    }

    fn grow(&mut self, packet: &mut OwnedBinary, len: usize) {
        if !packet.realloc(len) {
            let mut larger = OwnedBinary::new(len);
            larger.as_mut_slice()[..packet.len()].copy_from_slice(packet);
            *packet = larger;
        }
    }

    fn large(&mut self, packet: OwnedBinary) {
        if let Some(end) = end_of_bad_header(&packet) {
            return self.small(&[&packet[..end]]);
        }
        self.cost += packet.len() + PACKET_COST;
        self.packets.push(Packet::Own(packet));
    }

    fn small(&mut self, parts: &[&[u8]]) {
        let start = self.small.len();
        for part in parts {
            self.small.extend_from_slice(part);
        }
        if let Some(end) = end_of_bad_header(&self.small[start..]) {
            self.small.truncate(start + end);
        }
        let len = self.small.len() - start;
        self.cost += len + PACKET_COST;
        self.packets.push(Packet::Small(start, len));
    }
}

#[cfg(test)]
mod tests {
    use super::end_of_bad_header;

    #[test]
    fn headers_with_atoms_are_cut_behind_their_number() {
        assert_eq!(end_of_bad_header(&[131, 68, 3, 136, 8]), Some(3));
        assert_eq!(end_of_bad_header(&[131, 68, 255]), Some(3));
        let mut first = [0; 30];
        first[..2].copy_from_slice(&[131, 69]);
        assert_eq!(end_of_bad_header(&first), None);
        first[18] = 1;
        assert_eq!(end_of_bad_header(&first), Some(19));
    }

    #[test]
    fn others_stay_whole() {
        for packet in [
            &[][..],
            &[131],
            &[131, 68],
            &[131, 68, 0, 104],
            &[131, 70, 9, 9],
            &[112, 68, 3],
        ] {
            assert_eq!(end_of_bad_header(packet), None);
        }
    }
}
