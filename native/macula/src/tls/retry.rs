//! The tag by which a client knows that a Retry answers its first packet (RFC 9001, section 5.8).

use aws_lc_rs::aead;
use quinn_proto::ConnectionId;

/// Of a packet without its tag.
pub(super) fn tag(orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
    const KEY: [u8; 16] = [
        0xbe, 0x0c, 0x69, 0x0b, 0x9f, 0x66, 0x57, 0x5a, 0x1d, 0x76, 0x6b, 0x54, 0xe3, 0x68, 0xc8,
        0x4e,
    ];
    const NONCE: [u8; 12] = [
        0x46, 0x15, 0x99, 0xd3, 0x5d, 0x63, 0x2b, 0xf2, 0x23, 0x98, 0x25, 0xbb,
    ];
    let length = orig_dst_cid.len() as u8;
    let pseudo_packet = [&[length], &orig_dst_cid[..], packet].concat();
    let key = aead::UnboundKey::new(&aead::AES_128_GCM, &KEY).expect("a key of 16 bytes");
    let sealed = aead::LessSafeKey::new(key).seal_in_place_separate_tag(
        aead::Nonce::assume_unique_for_key(NONCE),
        aead::Aad::from(pseudo_packet),
        &mut [],
    );
    let sealed = sealed.expect("nothing is sealed");
    let mut tag = [0; 16];
    tag.copy_from_slice(sealed.as_ref());
    tag
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 9001, appendix A.4.
    #[test]
    fn the_tag_of_a_retry_is_that_of_the_rfc() {
        let id = ConnectionId::new(&[0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08]);
        let packet = [
            0xff, 0x00, 0x00, 0x00, 0x01, 0x00, 0x08, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62,
            0xb5, 0x74, 0x6f, 0x6b, 0x65, 0x6e,
        ];
        let tag = [
            0x04, 0xa2, 0x65, 0xba, 0x2e, 0xff, 0x4d, 0x82, 0x90, 0x58, 0xfb, 0x3f, 0x0f, 0x24,
            0x96, 0xba,
        ];
        assert_eq!(tag, super::tag(&id, &packet));
    }
}
