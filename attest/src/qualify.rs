//! H: what a quote's qualifying data binds. Both ends compute it here, from the same fields in the same order.

use policy::{
    AttestationId, CustomerId, Digest, HostId, Nonce, VmId, instance::EarlierPeer, operation::OperationRequest,
};

/// Everything that a quote vouches for beside the PCRs.
#[derive(Debug, Clone, Copy)]
pub struct Qualified<'a> {
    /// The provider's nonce.
    pub nonce: &'a Nonce,
    /// The attestation.
    pub attestation: &'a AttestationId,
    /// The host, as its TPM service knows itself.
    pub host: &'a HostId,
    /// The customer, as registered with the TPM service.
    pub customer: &'a CustomerId,
    /// The VM, likewise.
    pub vm: &'a VmId,
    /// SHA-256 of the VM file, likewise.
    pub vm_file: &'a Digest,
    /// What is asked for.
    pub operation: &'a OperationRequest,
    /// The VM process's one-time bundle key: X25519 public key, 32 bytes.
    pub bundle_key: &'a [u8; 32],
    /// SHA-256 of the DER SubjectPublicKeyInfo of the VM process's client key.
    pub client_key: &'a Digest,
    /// Name (TPM 2.0 part 1, section 16) of the host's wrap key: 34 bytes for SHA-256.
    pub wrap_key_name: &'a [u8],
    /// Whether an earlier process of this VM lives on this host.
    pub earlier_peer: EarlierPeer,
    /// The firmware log, as sent.
    pub firmware_log: &'a [u8],
    /// The layer log, as sent.
    pub layer_log: &'a [u8],
    /// The IMA log from `ima_offset` on, as sent.
    pub ima_log: &'a [u8],
    /// Where in the IMA log `ima_log` begins, in bytes.
    pub ima_offset: u64,
    /// Pin of the provider's CA, from the VM file's header.
    pub pin: &'a Digest,
    /// The VM process's claims, as the JSON bytes sent.
    pub claims: &'a [u8],
}

impl Qualified<'_> {
    /// SHA-256 over the canonical encoding: the quote's qualifyingData.
    pub fn digest(&self) -> Digest {
        let earlier = match self.earlier_peer {
            EarlierPeer::None => 0,
            EarlierPeer::Lives => 1,
            EarlierPeer::Unknown => 2,
        };
        Digest::of_fields(
            "fealty attestation v1",
            &[
                &self.nonce.0,
                &self.attestation.0,
                self.host.0.as_bytes(),
                self.customer.as_str().as_bytes(),
                self.vm.as_str().as_bytes(),
                self.vm_file.as_bytes(),
                self.operation.digest().as_bytes(),
                self.bundle_key,
                self.client_key.as_bytes(),
                self.wrap_key_name,
                &[earlier],
                Digest::of(self.firmware_log).as_bytes(),
                Digest::of(self.layer_log).as_bytes(),
                Digest::of(self.ima_log).as_bytes(),
                &self.ima_offset.to_be_bytes(),
                self.pin.as_bytes(),
                self.claims,
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use policy::Operation;
    use proptest::prelude::*;

    /// The fields as bytes, so that a test can change any of them.
    #[derive(Clone, Debug)]
    struct Fields {
        fixed: [[u8; 32]; 7],
        id: [u8; 16],
        customer: String,
        vm: String,
        name: Vec<u8>,
        logs: [Vec<u8>; 3],
        offset: u64,
        earlier: u8,
        claims: Vec<u8>,
        operation: u8,
    }

    impl Fields {
        fn digest(&self) -> Digest {
            let [nonce, host, file, bundle, client, pin, _] = &self.fixed;
            let earlier = [EarlierPeer::None, EarlierPeer::Lives, EarlierPeer::Unknown][usize::from(self.earlier % 3)];
            let operation = Operation::ALL[usize::from(self.operation) % Operation::ALL.len()];
            Qualified {
                nonce: &Nonce(*nonce),
                attestation: &AttestationId(self.id),
                host: &HostId(Digest(*host)),
                customer: &self.customer.parse().expect("label"),
                vm: &self.vm.parse().expect("label"),
                vm_file: &Digest(*file),
                operation: &OperationRequest::plain(operation),
                bundle_key: bundle,
                client_key: &Digest(*client),
                wrap_key_name: &self.name,
                earlier_peer: earlier,
                firmware_log: &self.logs[0],
                layer_log: &self.logs[1],
                ima_log: &self.logs[2],
                ima_offset: self.offset,
                pin: &Digest(*pin),
                claims: &self.claims,
            }
            .digest()
        }
    }

    fn fields() -> impl Strategy<Value = Fields> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
        (
            (any::<[[u8; 32]; 7]>(), any::<[u8; 16]>(), "[a-z]{1,20}", "[a-z]{1,20}", bytes()),
            ([bytes(), bytes(), bytes()], any::<u64>(), 0..3_u8, bytes(), 0..9_u8),
        )
            .prop_map(|((fixed, id, customer, vm, name), (logs, offset, earlier, claims, operation))| Fields {
                fixed,
                id,
                customer,
                vm,
                name,
                logs,
                offset,
                earlier,
                claims,
                operation,
            })
    }

    proptest! {
        #[test]
        fn attack_12_47_whatever_differs_h_differs(a in fields(), b in fields(), which in 0..16_usize) {
            let mut changed = a.clone();
            match which {
                at @ 0..6 => changed.fixed[at] = b.fixed[at],
                6 => changed.id = b.id,
                7 => changed.customer = b.customer,
                8 => changed.vm = b.vm,
                9 => changed.name = b.name,
                at @ 10..13 => changed.logs[at - 10] = b.logs[at - 10].clone(),
                13 => changed.offset = b.offset,
                14 => changed.earlier = b.earlier,
                _ => changed.claims = b.claims,
            }
            let same = format!("{a:?}") == format!("{changed:?}");
            prop_assert_eq!(a.digest() == changed.digest(), same);
        }

        #[test]
        fn bytes_moved_from_one_field_to_the_next_change_h(a in fields(), cut in 0..20_usize) {
            prop_assume!(cut < a.customer.len() && cut > 0);
            let (left, right) = a.customer.split_at(cut);
            let moved = Fields { customer: left.to_owned(), vm: format!("{right}{}", a.vm), ..a.clone() };
            prop_assume!(moved.vm.len() <= 63);
            prop_assert_ne!(a.digest(), moved.digest());
        }
    }
}
