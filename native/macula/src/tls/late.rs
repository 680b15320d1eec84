//! What TLS says after the handshake, to a session that is over.

use quinn_proto::Side;
use rustls::AlertDescription;

/// Passes over the messages of TLS that come after the handshake.
#[derive(Default)]
pub(super) struct Late {
    /// The type of a message and its length, of which so many bytes have come.
    header: [u8; 4],
    has: usize,
    /// Bytes of a message that are to come.
    body: usize,
}

impl Late {
    /// The type of NewSessionTicket (RFC 8446, section 4).
    const TICKET: u8 = 4;
    /// More than rustls takes of a message.
    const TOO_LONG: usize = 0x1_0000;

    /// A client gets tickets. There is nothing else in QUIC (RFC 9001, sections 4.4 and 6).
    pub(super) fn read(&mut self, side: Side, mut bytes: &[u8]) -> Result<(), AlertDescription> {
        while let Some((first, rest)) = bytes.split_first() {
            if self.body > 0 {
                let passed = self.body.min(bytes.len());
                self.body -= passed;
                bytes = bytes.split_at(passed).1;
                continue;
            }
            if self.has == 0 && (side == Side::Server || *first != Self::TICKET) {
                return Err(AlertDescription::UnexpectedMessage);
            }
            if let Some(next) = self.header.get_mut(self.has) {
                *next = *first;
            }
            self.has += 1;
            bytes = rest;
            if self.has == self.header.len() {
                let [_, high, middle, low] = self.header;
                self.body = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
                self.has = 0;
                if self.body >= Self::TOO_LONG {
                    return Err(AlertDescription::DecodeError);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_are_passed_over_in_pieces_of_any_size() {
        let ticket = [&[4, 0, 1, 2][..], &[7; 0x102]].concat();
        let tickets = [ticket.as_slice(), &[4, 0, 0, 0], &ticket].concat();
        for size in 1..tickets.len() {
            let mut late = Late::default();
            for piece in tickets.chunks(size) {
                assert_eq!(Ok(()), late.read(Side::Client, piece));
            }
            assert_eq!(
                Err(AlertDescription::UnexpectedMessage),
                late.read(Side::Client, &[24])
            );
        }
    }
}
