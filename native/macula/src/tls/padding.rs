//! A probe of a path's MTU is a PING and thousands of bytes of PADDING (RFC 9000, section 14.4), which
//! quinn-proto reads one by one: about an eighth of what a new link cost. Whoever decrypts such a packet
//! leaves one byte of the padding, which says the same.

use std::any::Any;
use std::sync::Arc;

use bytes::BytesMut;
use quinn_proto::crypto::{
    self, CryptoError, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey,
    UnsupportedVersion,
};
use quinn_proto::transport_parameters::TransportParameters;
use quinn_proto::{ConnectError, ConnectionId, Side, TransportError};

/// A shorter packet costs little.
const LONG: usize = 1_400;
/// The frames of a byte that a probe begins with, at most.
const FRAMES: usize = 4;

const PADDING: u8 = 0x00;
const PING: u8 = 0x01;
const IMMEDIATE_ACK: u8 = 0x1f;

/// Leaves one byte of PADDING in a long packet that has nothing else behind a PING.
pub(super) fn cut(payload: &mut BytesMut) {
    if payload.len() < LONG {
        return;
    }
    let is_short = |frame: &&u8| matches!(**frame, PING | IMMEDIATE_ACK);
    let frames = payload.iter().take(FRAMES).take_while(is_short).count();
    if is_padding(&payload[frames..]) {
        payload.truncate(frames + 1);
    }
}

/// Looks at many bytes at a time. Most packets have something else in the first of them.
fn is_padding(bytes: &[u8]) -> bool {
    bytes.first() == Some(&PADDING)
        && bytes
            .chunks(64)
            .all(|some| some.iter().fold(0, |all, byte| all | byte) == PADDING)
}

/// A configuration whose sessions pass padding quickly.
pub(crate) struct Passing<C>(pub(crate) Arc<C>);

impl<C: crypto::ClientConfig> crypto::ClientConfig for Passing<C> {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn crypto::Session>, ConnectError> {
        let inner = self.0.clone();
        let session = inner.start_session(version, server_name, params)?;
        Ok(Box::new(Session(session)))
    }
}

impl<C: crypto::ServerConfig> crypto::ServerConfig for Passing<C> {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        self.0.initial_keys(version, dst_cid)
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.0.retry_tag(version, orig_dst_cid, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        params: &TransportParameters,
    ) -> Box<dyn crypto::Session> {
        let inner = self.0.clone();
        Box::new(Session(inner.start_session(version, params)))
    }
}

struct Session(Box<dyn crypto::Session>);

impl crypto::Session for Session {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.0.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.0.handshake_data()
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.0.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        self.0.early_crypto()
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.0.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        self.0.read_handshake(buf)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        self.0.transport_parameters()
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let mut keys = self.0.write_handshake(buf)?;
        keys.packet = Key::pair(keys.packet);
        Some(keys)
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        Some(Key::pair(self.0.next_1rtt_keys()?))
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.0.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.0.export_keying_material(output, label, context)
    }
}

struct Key(Box<dyn PacketKey>);

impl Key {
    fn pair(keys: KeyPair<Box<dyn PacketKey>>) -> KeyPair<Box<dyn PacketKey>> {
        KeyPair {
            local: keys.local,
            remote: Box::new(Key(keys.remote)),
        }
    }
}

impl PacketKey for Key {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        self.0.encrypt(packet, buf, header_len);
    }

    fn decrypt(
        &self,
        packet: u64,
        header: &[u8],
        payload: &mut BytesMut,
    ) -> Result<(), CryptoError> {
        self.0.decrypt(packet, header, payload)?;
        cut(payload);
        Ok(())
    }

    fn tag_len(&self) -> usize {
        self.0.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.0.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.0.integrity_limit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left_of(begin: &[u8], zeros: usize, end: &[u8]) -> Vec<u8> {
        let payload = [begin, &vec![0; zeros], end].concat();
        let mut payload = BytesMut::from(payload.as_slice());
        cut(&mut payload);
        payload.to_vec()
    }

    #[test]
    fn a_probe_is_read_as_a_ping_and_one_byte_of_padding() {
        assert_eq!(vec![PING, PADDING], left_of(&[PING], 32_000, &[]));
        assert_eq!(
            vec![PING, IMMEDIATE_ACK, PADDING],
            left_of(&[PING, IMMEDIATE_ACK], 32_000, &[])
        );
        assert_eq!(vec![PADDING], left_of(&[], 32_000, &[]));
    }

    #[test]
    fn what_is_no_probe_stays_as_it_is() {
        // A stream to the packet's end, and one with a length: their zeros are data.
        for begin in [
            &[0x08, 0x04][..],
            &[PING, 0x08, 0x04],
            &[PING, 0x0a, 0x04, 0x7d, 0x00],
            &[0x02, 0x05, 0x00, 0x00, 0x00],
            &[0x30],
        ] {
            let whole = [begin, &vec![0; 32_000]].concat();
            assert_eq!(whole, left_of(begin, 32_000, &[]), "{begin:x?}");
        }
        // Something at the end, at each place of a look.
        for zeros in 32_000..32_070 {
            assert_eq!(zeros + 2, left_of(&[PING], zeros, &[PING]).len());
        }
        assert_eq!(vec![PING; 2_000], left_of(&[PING; 2_000], 0, &[]));
        assert_eq!(1_001, left_of(&[PING], 1_000, &[]).len());
        assert!(left_of(&[], 0, &[]).is_empty());
    }
}
